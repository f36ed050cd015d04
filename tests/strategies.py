"""What hypothesis draws specs from."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

from tq_tvm.spec import DTYPES, FORMATS, HEAD_DIMS, LAYOUTS, PAGE_SIZES, CacheSpec

specs = st.builds(
    lambda head_dim, group, heads, page_size, dtype, layout, fmt, dv, window: CacheSpec(
        head_dim, group * heads, heads, page_size, dtype, layout, fmt, dv, window
    ),
    st.sampled_from(HEAD_DIMS),
    st.integers(1, 64),
    st.integers(1, 128),
    st.sampled_from(PAGE_SIZES),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.sampled_from([*FORMATS, "mse4-int8-signed-unbiased"]),
    st.sampled_from([None, *HEAD_DIMS]),
    st.integers(0, 256),
)

# A machine under load must not fail a test.
untimed = settings(deadline=None)
