"""``splits``: how many parts a call has, and the workspace that they take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import specs, untimed

from tq_tvm.spec import CacheSpec
from tq_tvm.splits import (
    WORKSPACE_BYTES,
    launch_keys,
    mla_floats,
    mla_parts,
    num_ctas,
    num_groups,
    num_parts,
    num_splits,
    prefill_launch_keys,
    prefill_parts,
    prefills,
    workspace_floats,
)

SPEC = CacheSpec(head_dim=128, num_q_heads=32, num_kv_heads=8)

launches = st.fixed_dictionaries(
    {"ctas_per_sm": st.integers(1, 8), "split_tokens": st.sampled_from([1, 16, 64, 512])}
)
batches = st.integers(1, 512)
contexts = st.integers(1, 1 << 20)
processors = st.integers(1, 256)


def ctas(spec, batch):
    return batch * spec.num_kv_heads


@untimed
@given(specs, batches, contexts, launches, processors)
def test_splits_are_resident_at_once_and_pay_for_their_merge(spec, batch, context, launch, count):
    splits = num_splits(spec, batch, context, launch, count)
    slots = launch["ctas_per_sm"] * count
    assert splits >= 1
    assert splits == 1 or splits * ctas(spec, batch) <= slots
    assert splits == 1 or splits**2 * launch["split_tokens"] <= context
    more = splits + 1
    assert more * ctas(spec, batch) > slots or more**2 * launch["split_tokens"] > context


@untimed
@given(specs, batches, contexts, launches, processors)
def test_splits_are_monotonous(spec, batch, context, launch, count):
    splits = num_splits(spec, batch, context, launch, count)
    assert num_splits(spec, batch, context, launch, count + 1) >= splits
    assert num_splits(spec, batch, context + 1, launch, count) >= splits
    assert num_splits(spec, batch + 1, context, launch, count) <= splits


def test_splits_of_known_cases():
    launch = {"ctas_per_sm": 4, "split_tokens": 16}
    assert num_splits(SPEC, 64, 8192, launch, 132) == 1
    assert num_splits(SPEC, 16, 32768, launch, 132) == 4
    assert num_splits(SPEC, 1, 1 << 20, launch, 132) == 66
    assert num_splits(SPEC, 1, 8192, launch, 132) == 22
    assert num_splits(SPEC, 1, 0, launch, 132) == 1


group_launches = st.fixed_dictionaries(
    {
        "ctas_per_sm": st.integers(1, 8),
        "units": st.sampled_from([1, 4, 8, 64]),
        "group_tokens": st.sampled_from([64, 128, 1024]),
    }
)


@untimed
@given(specs, batches, contexts, group_launches, processors)
def test_groups_are_resident_at_once_and_have_enough_to_read(spec, batch, context, launch, count):
    groups = num_groups(spec, batch, context, launch, count)
    slots = launch["ctas_per_sm"] * count
    assert groups == 1 or groups * launch["units"] <= slots
    assert groups == 1 or (groups - 1) * launch["group_tokens"] < batch * context
    budget = WORKSPACE_BYTES + batch * context * spec.bytes_per_token / 100
    assert groups == 1 or 4 * workspace_floats(spec, batch, groups, launch) <= budget
    more = groups + 1
    assert (
        more * launch["units"] > slots
        or groups * launch["group_tokens"] >= batch * context
        or 4 * workspace_floats(spec, batch, more, launch) > budget
    )


cluster_launches = st.fixed_dictionaries(
    {
        "ctas_per_sm": st.integers(1, 8),
        "units": st.sampled_from([1, 4, 8, 64]),
        "cluster": st.sampled_from([8, 16]),
        "cta_tokens": st.sampled_from([32, 128, 512]),
    }
)


@untimed
@given(batches, contexts, cluster_launches, processors)
def test_clusters_have_processors_of_their_own_and_tokens(batch, context, launch, count):
    ctas = num_ctas(batch, context, launch, count)
    assert ctas in (1, 2, 4, 8, 16) and ctas <= launch["cluster"]
    assert ctas == 1 or ctas * launch["units"] * batch <= count
    assert ctas == 1 or (ctas - 1) * launch["cta_tokens"] < context
    more = 2 * ctas
    assert (
        more > launch["cluster"]
        or more * launch["units"] * batch > count
        or (more - 1) * launch["cta_tokens"] >= context
    )
    assert workspace_floats(SPEC, batch, ctas, launch) == 0


@untimed
@given(specs, batches, contexts, st.one_of(launches, group_launches, cluster_launches), processors)
def test_a_kernel_says_what_its_parts_are(spec, batch, context, launch, count):
    parts = num_parts(spec, batch, context, launch, count)
    if "cluster" in launch:
        assert parts == num_ctas(batch, context, launch, count)
    else:
        choose = num_groups if "group_tokens" in launch else num_splits
        assert parts == choose(spec, batch, context, launch, count)
    assert set(launch_keys(launch)) == set(launch)


@untimed
@given(specs, batches, st.integers(1, 64))
def test_workspace_holds_outputs_maxima_and_sums(spec, batch, parts):
    for launch, pieces in (
        ({"split_tokens": 16}, batch * parts),
        ({"group_tokens": 64}, 2 * parts),
    ):
        outputs = pieces * spec.num_q_heads * spec.value_dim
        maxima = sums = pieces * spec.num_q_heads
        assert workspace_floats(spec, batch, parts, launch) == outputs + maxima + sums


latent_launches = st.fixed_dictionaries(
    {
        "ctas_per_sm": st.just(1),
        "units": st.sampled_from([2, 4]),
        "part_tokens": st.sampled_from([64, 256, 512]),
        "pieces": st.sampled_from([1, 2]),
    }
)


@untimed
@given(batches, contexts, latent_launches, processors)
def test_parts_of_latents_are_resident_at_once(batch, context, launch, count):
    spec = CacheSpec(512, 16, 1, format="mse4-none-signed-matched", head_dim_v=64)
    parts = mla_parts(spec, batch, context, launch, count)
    assert parts >= 1
    assert parts == 1 or parts * batch * launch["units"] <= count
    assert parts == 1 or (parts - 1) * launch["part_tokens"] < context
    more = (parts + 1) * batch * launch["units"] > count
    assert more or parts * launch["part_tokens"] >= context
    floats = mla_floats(spec, batch, parts, launch)
    assert floats == batch * parts * launch["pieces"] * 16 * (512 + 2)


PREFILL = {"ctas_per_sm": 1, "units": 8, "rows": 256, "cluster": 8, "cta_tokens": 64}


@untimed
@given(specs, st.integers(1, 4096), contexts, st.sampled_from([128, 256]), processors)
def test_parts_of_a_block_of_rows_have_processors_and_tokens(spec, tokens, context, rows, count):
    launch = {**PREFILL, "rows": rows, "units": spec.num_kv_heads}
    parts = prefill_parts(spec, tokens, context, launch, count)
    blocks = max(1, tokens * spec.group_size // rows)

    def fits(parts):
        # Clusters of 4 and 8 do not find all slots of a chip side by side.
        slots = count if parts <= 2 else count * 10 // 11
        return parts * blocks * spec.num_kv_heads <= slots and context >= parts * 8 * 64

    assert parts in (1, 2, 4, 8)
    assert parts == 1 or fits(parts)
    assert parts == 8 or not fits(2 * parts), "twice as many would not fit"


def test_parts_of_known_chunks():
    parts = [prefill_parts(SPEC, n, 32768, PREFILL, 132) for n in (64, 256, 512, 1024, 2048)]
    assert parts == [8, 2, 2, 1, 1]
    # 16 clusters of 8 on 132 processors would be two waves.
    assert prefill_parts(SPEC, 64, 32768, {**PREFILL, "rows": 128}, 132) == 4
    assert prefill_parts(SPEC, 512, 1000, PREFILL, 132) == 1
    assert prefill_parts(SPEC, 512, 32768, {"rows": 256}, 132) == 1
    assert set(prefill_launch_keys(PREFILL)) == set(PREFILL)
    assert prefill_launch_keys({"rows": 256}) == ("rows",)


@pytest.mark.parametrize(
    ("rows", "tokens", "batch", "context", "wanted"),
    [
        (64, 1024, 64, 8192, True),  # 419 us, attend 845 (H100, k4v2)
        (64, 512, 64, 8192, False),  # half full
        (64, 256, 16, 4096, True),
        (64, 16, 1, 8192, False),  # few CTAs: 30 us, attend 27
        (64, 16, 1, 131072, False),
        (128, 32, 1, 131072, True),
        (128, 128, 1, 32768, True),
        (128, 2048, 1, 32768, True),
        (128, 15, 1, 32768, False),
    ],
)
def test_prefill_where_its_ctas_are_full_and_many(rows, tokens, batch, context, wanted):
    launch = {**PREFILL, "rows": rows, "ctas_per_sm": 2 if rows == 64 else 1}
    assert prefills(SPEC, tokens, context, tokens // batch, launch, 132) is wanted
    without = {"rows": rows}
    assert prefills(SPEC, 1 << 16, context, 1 << 16, without, 132)
    assert not prefills(SPEC, 1, context, 1, without, 132)
