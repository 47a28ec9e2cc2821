from hypothesis import given
from hypothesis import strategies as st

from loralib.data.packing import pack, pad
from loralib.data.tokens import TokenExample


@st.composite
def batches(draw):
    """Examples over few ids, so that many share a prefix; each token except the first may be trained."""
    count = draw(st.integers(1, 6))
    examples = []
    for _ in range(count):
        ids = draw(st.lists(st.integers(0, 2), min_size=1, max_size=9))
        trained = [False, *draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1))]
        examples.append(TokenExample(tuple(ids), tuple(trained)))
    return examples


def what_a_token_sees(row, place):
    """The ids from the first to this one that attention lets the token at `place` see, with their positions."""
    seen = [k for k in range(place + 1) if place < row.ends[k]]
    return tuple(row.ids[0, k].item() for k in seen), [row.positions[0, k].item() for k in seen]


def predictions(examples):
    """(what is seen, what is to be predicted) of every trained token, by the definition of TokenExample."""
    return sorted((e.ids[:i], e.ids[i]) for e in examples for i, trained in enumerate(e.trained) if trained)


@given(batches(), st.booleans())
def test_each_prediction_of_a_packed_row_sees_exactly_its_own_example(examples, share):
    row = pack(examples, share=share)
    made = []
    for state, target, weight in zip(row.states[row.rows], row.targets, row.weights, strict=True):
        seen, positions = what_a_token_sees(row, state.item())
        assert positions == list(range(len(seen)))
        made += [(seen, target.item())] * int(weight)
    assert sorted(made) == predictions(examples)
    assert row.trained_tokens == len(made)
    assert row.tokens == sum(len(e.ids) for e in examples)


@given(batches())
def test_shared_rows_hold_every_needed_beginning_once(examples):
    row = pack(examples)
    beginnings = {seen[:n] for seen, _ in predictions(examples) for n in range(1, len(seen) + 1)}
    assert row.processed_tokens == len(beginnings)
    assert {what_a_token_sees(row, place)[0] for place in range(row.processed_tokens)} == beginnings


@given(batches())
def test_padded_rows_predict_the_same(examples):
    rows = pad(examples)
    width = rows.ids.shape[1]
    made = []
    for state, target, weight in zip(rows.states[rows.rows], rows.targets, rows.weights, strict=True):
        row, place = divmod(state.item(), width)
        assert rows.mask[row, : place + 1].all()
        made += [(tuple(rows.ids[row, : place + 1].tolist()), target.item())] * int(weight)
    assert sorted(made) == predictions(examples)
    assert rows.trained_tokens == len(made)


@given(batches())
def test_rows_and_states_are_ascending(examples):
    for row in (pack(examples), pad(examples)):
        assert row.states.tolist() == sorted(set(row.states.tolist()))
        assert row.rows.tolist() == sorted(row.rows.tolist())
        assert set(row.rows.tolist()) == set(range(len(row.states)))


def test_an_empty_batch_packs_to_an_empty_row():
    assert pack([]).processed_tokens == 0
    assert pad([]).trained_tokens == 0
