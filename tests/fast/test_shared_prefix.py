"""Shared prefixes: the layout covers every token, and hidden states and gradients are those of padded rows."""

from hypothesis import given
from hypothesis import strategies as st

from lorapar_utils.fast.shared_prefix import bundled, layout

sequences_of_few_tokens = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=9)


@given(sequences_of_few_tokens, st.integers(1, 20))
def test_every_sequence_is_in_one_bundle_and_reads_itself(sequences, longest):
    bundles = bundled(sequences, longest)
    assert sorted(row for bundle in bundles for row in bundle.rows) == list(range(len(sequences)))
    for bundle in bundles:
        tokens, positions, allowed, places = layout(bundle, sequences)
        assert tokens.shape[1] <= max(longest, len(sequences[bundle.rows[0]]))
        for row in bundle.rows:
            assert tokens[0, places[row]].tolist() == sequences[row]
            assert positions[0, places[row]].tolist() == list(range(len(sequences[row])))
            for i, place in enumerate(places[row]):
                assert allowed[place].nonzero().squeeze(1).tolist() == places[row][: i + 1].tolist()


@given(sequences_of_few_tokens)
def test_bundling_never_reads_more_tokens(sequences):
    read = sum(layout(bundle, sequences)[0].shape[1] for bundle in bundled(sequences))
    assert read <= sum(map(len, sequences))


def test_completions_of_a_prompt_share_it_and_prompts_stay_apart():
    prompts = [[1] * 5 + [i] * 20 for i in range(3)]
    rows = [[*prompt, 7, answer] for prompt in prompts for answer in range(4)]
    bundles = bundled(rows)
    assert [(bundle.rows, bundle.prefix) for bundle in bundles] == [
        ((0, 1, 2, 3), 26),
        ((4, 5, 6, 7), 26),
        ((8, 9, 10, 11), 26),
    ]
