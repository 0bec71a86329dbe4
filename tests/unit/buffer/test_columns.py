"""Block minima against plain minima."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.sampling import columns
from buffer.sampling.columns import BlockMinima

numbers = st.integers(-20, 20)
operations = st.one_of(
    st.tuples(st.just("append"), st.lists(numbers, min_size=1, max_size=12)),
    st.tuples(st.just("put"), st.dictionaries(st.integers(0, 15), numbers, max_size=3)),
    st.tuples(st.just("clear"), st.sets(st.integers(0, 15), max_size=3)),
    st.tuples(st.just("below"), numbers),
    st.tuples(st.just("keep"), st.sets(st.integers(0, 15))),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(operations, max_size=25))
def test_as_plain_minima(history):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "_BLOCK", 3)
        minima, plain = BlockMinima(), []
        for name, argument in history:
            if name == "append":
                minima.append(np.array(argument, dtype=np.int64))
                plain += map(float, argument)
            elif name == "below":
                expected = [slot for slot, value in enumerate(plain) if value < argument]
                assert minima.below(argument).tolist() == expected
            else:
                slots = [slot for slot in argument if slot < len(plain)]
                places = np.array(slots, dtype=np.int64)
                if name == "put":
                    minima.put(places, np.array([argument[slot] for slot in slots], dtype=np.float32))
                    for slot in slots:
                        plain[slot] = float(argument[slot])
                elif name == "clear":
                    minima.clear(places)
                    for slot in slots:
                        plain[slot] = np.inf
                else:
                    slots.sort()
                    minima.keep(np.array(slots, dtype=np.int64))
                    plain = [plain[slot] for slot in slots]
            assert minima.values.tolist() == plain
            assert minima.smallest() == min(plain, default=np.inf)


def test_a_value_that_was_lowered_behind_a_smaller_one_is_found():
    minima = BlockMinima()
    minima.append(np.array([-5] + 3000 * [0], dtype=np.int64))
    minima.put(np.array([2000]), np.array([-10], dtype=np.float32))
    assert minima.smallest() == -10
    assert minima.below(-7).tolist() == [2000]
    minima.clear(np.array([2000]))
    assert minima.smallest() == -5
