"""The verdict that a teacher's words end with."""

import html
import json
import re
import unicodedata

# Start and end of a model's thinking: tags, and the channels of gpt-oss and Gemma.
_THOUGHTS = r"(?:think|thinking|thoughts?|reason|reasoning|analysis|reflection|scratchpad|seed:think)"
OPENED = re.compile(
    rf"<{_THOUGHTS}(?:\s[^<>]*)?>|\[THINK\]|◁think▷|<\|begin_of_thought\|>"
    r"|<\|channel\|?>\s*(?:analysis|commentary|thought)",
    re.I,
)
CLOSED = re.compile(
    rf"</{_THOUGHTS}\s*>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|channel\|>\s*final|<channel\|>", re.I
)
# Stop tokens that a server left in, and tags for an answer or for layout.
LEFT_IN = re.compile(
    r"<\|[^<>|\n]*\|?>|<[^<>|\s]+\|>|\[\|[^\[\]|\n]*\|\]|</?s>|\[/?(?:INST|EOS|BOS|DONE)\]"
    r"|<(?:bos|eos|pad|eot|end|(?:start|end)_of_(?:turn|utterance|text))>"
    r"|</?(?:(?:final[_-]?)?(?:answer|verdict|vote|classification|decision|judge?ment|result|output|response)|final"
    r"|b|strong|i|em|u|code|pre|p|br|div|span|center|mark|h[1-6]|li|ul|ol|blockquote)\s*/?>",
    re.I,
)
LATEX = re.compile(
    r"\\+(?:boxed|fbox|framebox|text\w*|math(?:rm|bf|sf|it|tt)|emph|operatorname|mbox|bm)\s*\{([^{}]*)\}"
)
LATEX_MARKS = re.compile(r"\\[\[\](),;:! ]|\$")
LABEL = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:(?:the|my)\s+)?(?:(?:final|overall)\s+)?"
    r"(?:answer|verdict|vote|classification|judge?ment|decision|conclusion|result|category|label|choice|kind|type"
    r"|response|output)(?:\s+is)?\s*(?:[:=→⇒]|[=–—-]+>?)?",
    re.I,
)
SYSTEM = re.compile(r"system(?:\s*|[~‐–-])(?:(1|i|one)|(2|ii|two))\b", re.I)
NO_VERDICT = "no verdict in the last line"
BULLETS, STOPS = " \t\r\n\f\v#>+.:•·●▪◦‣–—-", " \t\r\n\f\v#.:!,;–—-"


def parse_vote(text: str) -> tuple[int, str]:
    r"""The system that an answer ends with, and ""; or 0 and the reason for the abstention.

    The last line has to say `System 1` or `System 2` and nothing else, except `Answer:` before it and decoration:
    Markdown, LaTeX, quotes, brackets, tags such as `<answer>`, stop tokens. The number can be spelled `II` or in
    full-width digits. One JSON object with one answer is accepted too. Reasoning before the last line, in `<think>`
    tags or not, is skipped. Everything else is an abstention, never a guess.

    >>> parse_vote("It chains three sums. **Answer:** System 2")
    (0, 'no verdict in the last line')
    >>> parse_vote("It chains three sums.\n**Answer:** System 2")
    (2, '')
    """
    plain = unicodedata.normalize("NFKC", html.unescape(text))
    plain = "".join(character for character in plain if unicodedata.category(character) != "Cf")
    visible = CLOSED.split(plain)[-1]
    if OPENED.search(visible):
        return 0, "stopped while thinking"
    lines = [bare for line in _json_answer(visible).splitlines() if (bare := _bare(line))]
    if not lines:
        return 0, "empty answer"
    system, labelled = _verdict(lines[-1])
    if system and not labelled and len(lines) > 1 and _verdict(lines[-2])[0] == 3 - system:
        return 0, NO_VERDICT  # both systems, one per line, are the list of choices
    return (system, "") if system else (0, NO_VERDICT)


def _verdict(bare: str) -> tuple[int, bool]:
    """The system that a bare line names, else 0, and whether the line is labelled as the answer."""
    label = LABEL.match(bare)
    match = SYSTEM.fullmatch(_bare(bare[label.end() :]) if label else bare)
    return (0 if match is None else 1 if match[1] else 2), label is not None


def _bare(line: str) -> str:
    """A line without decoration."""
    line = LATEX_MARKS.sub(" ", LEFT_IN.sub(" ", line))
    while (inner := LATEX.sub(r"\1", line)) != line:
        line = inner
    line = re.sub("[*`\"'“”„‘’‚«»‹›「」]", "", line).replace("_", " ")
    while True:
        line = line.lstrip(BULLETS).rstrip(STOPS)  # a pattern would take minutes over ten thousand dashes
        wrapped = re.fullmatch(r"\((\S.*)\)|\[(\S.*)\]|\{(\S.*)\}|【(\S.*)】", line)
        if wrapped is None:
            return line
        line = wrapped[wrapped.lastindex]


def _json_answer(visible: str) -> str:
    """The value of a final JSON object with one label that names one system; other texts stay unchanged."""
    ending = LEFT_IN.sub(" ", visible[visible.rfind("{") :]).strip("`\n\t ")
    try:
        fields = json.loads(ending)
    except ValueError:
        return visible
    answers = (
        [value for key, value in fields.items() if LABEL.fullmatch(_bare(key))] if isinstance(fields, dict) else []
    )
    systems = {named[1] is None for named in SYSTEM.finditer(ending)}
    return f"answer: {answers[0]}" if len(answers) == len(systems) == 1 else visible
