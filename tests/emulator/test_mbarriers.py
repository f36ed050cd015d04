"""Warps with parts of their own: mbarriers, named barriers, and stores to CTAs of a cluster."""

from __future__ import annotations

import pytest
import torch

from emulator import TranslationError, compile_source, translate
from emulator.kernels import kernel, source

HELPERS = """
__forceinline__ __device__ uint32_t address_of(const void* pointer) {
  return __cvta_generic_to_shared(pointer);
}
__forceinline__ __device__ uint32_t mapped(const void* pointer, uint32_t rank) {
  uint32_t address, own = __cvta_generic_to_shared(pointer);
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
  return address;
}
__forceinline__ __device__ void init(const void* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;"
               :: "r"(address_of(barrier)), "r"(count) : "memory");
}
__forceinline__ __device__ void fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__forceinline__ __device__ void arrive(const void* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];"
               :: "r"(address_of(barrier)) : "memory");
}
__forceinline__ __device__ void arrive_many(const void* barrier, uint32_t count) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0+8], %1;"
               :: "r"(address_of(barrier) - 8), "r"(count) : "memory");
}
__forceinline__ __device__ uint64_t arrive_state(const void* barrier) {
  uint64_t state;
  asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];"
               : "=l"(state) : "r"(address_of(barrier)) : "memory");
  return state;
}
__forceinline__ __device__ void expect(const void* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
               :: "r"(address_of(barrier)), "r"(bytes) : "memory");
}
__forceinline__ __device__ void arrive_remote(uint32_t address) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];"
               :: "r"(address) : "memory");
}
__forceinline__ __device__ void arrive_if(const void* barrier, uint32_t yes) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %1, 0; @p mbarrier.arrive.shared.b64 _, [%0]; }"
               :: "r"(address_of(barrier)), "r"(yes) : "memory");
}
__forceinline__ __device__ uint32_t try_wait(const void* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{ .reg .pred pd0; mbarrier.try_wait.parity.shared.b64 pd0, [%1], %2, %3; "
               "selp.b32 %0, 1, 0, pd0; }"
               : "=r"(done) : "r"(address_of(barrier)), "r"(parity), "r"(1000) : "memory");
  return done;
}
__forceinline__ __device__ uint32_t test_wait(const void* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{ .reg .pred pd0; mbarrier.test_wait.parity.shared::cta.b64 pd0, [%1], %2; "
               "selp.b32 %0, 1, 0, pd0; }"
               : "=r"(done) : "r"(address_of(barrier)), "r"(parity) : "memory");
  return done;
}
__forceinline__ __device__ void wait(void* barrier, int phase) {
    unsigned int barrier_addr_int = __cvta_generic_to_shared(barrier);
    unsigned int ticks = 0x989680;
    asm volatile(
        "{\\n"
        ".reg .pred                P1;\\n"
        "LAB_WAIT:\\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 P1, [%0], %1, %2;\\n"
        "@P1                       bra.uni DONE;\\n"
        "bra.uni                   LAB_WAIT;\\n"
        "DONE:\\n"
        "}\\n"
        :: "r"(barrier_addr_int), "r"(phase), "r"(ticks) : "memory");
}
__forceinline__ __device__ void wait_for_cluster_writes(void* barrier, int phase) {
    unsigned int barrier_addr_int = __cvta_generic_to_shared(barrier);
    asm volatile(
        "{\\n"
        ".reg .pred                P1;\\n"
        "LAB_WAIT_AC:\\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 P1, [%0], %1;\\n"
        "@P1                       bra.uni DONE_AC;\\n"
        "bra.uni                   LAB_WAIT_AC;\\n"
        "DONE_AC:\\n"
        "}\\n"
        :: "r"(barrier_addr_int), "r"(phase) : "memory");
}
__forceinline__ __device__ void send(uint32_t address, uint32_t barrier, uint32_t value) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];"
               :: "r"(address), "r"(value), "r"(barrier) : "memory");
}
__forceinline__ __device__ void send_4(uint32_t address, uint32_t barrier, float v0, float v1,
                                       float v2, float v3) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
               "[%0], {%1, %2, %3, %4}, [%5];"
               :: "r"(address), "f"(v0), "f"(v1), "f"(v2), "f"(v3), "r"(barrier) : "memory");
}
__forceinline__ __device__ void store_remote(uint32_t address, uint32_t v0, uint32_t v1) {
  asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};"
               :: "r"(address), "r"(v0), "r"(v1) : "memory");
}
__forceinline__ __device__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__forceinline__ __device__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
__forceinline__ __device__ void bar_arrive(uint32_t id, uint32_t count) {
  asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(count) : "memory");
}
__forceinline__ __device__ void barrier_arrive(uint32_t id, uint32_t count) {
  asm volatile("barrier.arrive.aligned %0, %1;" :: "r"(id), "r"(count) : "memory");
}
__forceinline__ __device__ void bar_sync(uint32_t id, uint32_t count) {
  asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(count) : "memory");
}
"""
SHARED = """
  __shared__ alignas(64) uint32_t data_ptr[64];
  __shared__ uint64_t full_ptr[2];
  __shared__ uint64_t empty_ptr[2];
  int warp = int(threadIdx.x) / 32;
"""
# Two warps: one of producers, one of consumers, which take eight rounds of words of `in`.
KERNELS = {
    "ring": SHARED
    + """
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) { init(&full_ptr[i], 32); init(&empty_ptr[i], 1); }
    fence_init();
  }
  __syncthreads();
  for (int round = 0; round < 8; ++round) {
    int slot = round % 2, phase = round / 2 % 2;
    if (warp == 0) {
      wait(&empty_ptr[slot], phase ^ 1);
      data_ptr[slot * 32 + lane] = in[row * 8 + round];
      arrive(&full_ptr[slot]);
    } else {
      wait(&full_ptr[slot], phase);
      out[row * 8 + round] = data_ptr[slot * 32 + (lane ^ 1)];
      __syncwarp();
      arrive_if(&empty_ptr[slot], lane == 0);
    }
  }
""",
    # Without the wait for an empty buffer, the producers overtake.
    "overtaking_ring": SHARED
    + """
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) init(&full_ptr[i], 32);
  }
  __syncthreads();
  for (int round = 0; round < 4; ++round) {
    int slot = round % 2, phase = round / 2 % 2;
    if (warp == 0) {
      data_ptr[slot * 32 + lane] = in[row * 8 + round];
      arrive(&full_ptr[slot]);
    } else {
      wait(&full_ptr[slot], phase);
      out[row * 8 + round] = data_ptr[slot * 32 + (lane ^ 1)];
    }
  }
""",
    "one_lane_waits": SHARED
    + """
  if (threadIdx.x == 0) init(&full_ptr[0], 2);
  __syncthreads();
  if (warp == 1) {
    if (lane == 0) wait(&full_ptr[0], 0);
    __syncwarp();
    out[row * 8] = data_ptr[lane];
  } else {
    data_ptr[lane] = in[row * 8];
    __syncwarp();
    if (lane == 3) arrive_many(&full_ptr[0], 2);
  }
""",
    "tests": SHARED
    + """
  if (threadIdx.x == 0) init(&full_ptr[0], 1);
  __syncthreads();
  out[row * 8] = test_wait(&full_ptr[0], 1);
  __syncthreads();
  if (warp == 1) {
    int failed = 0;
    while (!test_wait(&full_ptr[0], 0)) ++failed;
    out[row * 8 + 1] = data_ptr[0];
    out[row * 8 + 2] = test_wait(&full_ptr[0], 1);
    bar_arrive(4, 64);
    while (!try_wait(&full_ptr[0], 1)) ++failed;
    out[row * 8 + 3] = failed;
  } else {
    if (lane == 0) {
      data_ptr[0] = 77;
      out[row * 8 + 1] = arrive_state(&full_ptr[0]) != 0;
    }
    bar_sync(4, 64);
    if (lane == 0) arrive(&full_ptr[0]);
  }
""",
    # Producers go on to a second buffer; consumers answer.
    "named": SHARED
    + """
  for (int round = 0; round < 4; ++round) {
    if (warp == 0) {
      if (round) bar_sync(2, 64);
      data_ptr[lane] = in[row * 8 + round];
      bar_arrive(1, 64);
    } else {
      bar_sync(1, 64);
      out[row * 8 + round] = data_ptr[lane ^ 1];
      if (round < 3) barrier_arrive(2, 64);
    }
  }
""",
    "arrivals_apart": "  if (threadIdx.x < 32) bar_arrive(1, 64); else bar_sync(1, 96);",
    "arrives_twice": "  if (threadIdx.x < 32) { bar_arrive(1, 96); bar_arrive(1, 96); }",
    "arrives_and_waits": "  if (threadIdx.x < 32) { bar_arrive(1, 64); bar_sync(1, 64); }",
    "odd_count": "  bar_arrive(1, 48);",
    "nobody_arrives": "  if (threadIdx.x < 32) bar_sync(1, 64);",
    "two_lines": """
  if (threadIdx.x < 32) bar_sync(1, 64);
  else {
    bar_sync(1, 64);
  }
""",
    "deadlock": SHARED
    + """
  if (threadIdx.x == 0) init(&full_ptr[0], 3);
  __syncthreads();
  if (warp == 0) wait(&full_ptr[0], 0);
  else if (lane == 0) arrive(&full_ptr[0]);
""",
    "not_there": SHARED + "  arrive(&full_ptr[0]);",
    "no_count": SHARED + "  init(&full_ptr[0], 0);",
    "too_many": SHARED + "  init(&full_ptr[0], 1);\n  arrive_many(&full_ptr[0], 2);",
    "misaligned": SHARED + "  init(&data_ptr[1], 1);",
    "parity": SHARED + "  init(&full_ptr[0], 1);\n  wait(&full_ptr[0], 2);",
    "registers": """
  asm volatile("setmaxnreg.dec.sync.aligned.u32 40;" ::: "memory");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;" ::: "memory");
  out[row * 8] = 1;
""",
    "odd_registers": '  asm volatile("setmaxnreg.inc.sync.aligned.u32 100;" ::: "memory");',
}
# Two CTAs of 64 threads; the second one is reached by what the first one sends, and answers.
PEER = (
    SHARED
    + """
  uint32_t rank = blockIdx.x % 2;
  if (threadIdx.x == 0) {
    init(&full_ptr[0], 1);
    init(&empty_ptr[0], 32);
    fence_init();
  }
"""
)
BEGIN = "  cluster_arrive();\n  cluster_wait();\n"
END = BEGIN
CLUSTERS = {
    "remote_arrivals": PEER
    + BEGIN
    + """
  if (rank == 1) {
    if (warp == 0) store_remote(mapped(&data_ptr[2 * lane], 0), in[row * 8], in[row * 8 + 1]);
    if (warp == 0) arrive_remote(mapped(&empty_ptr[0], 0));
  } else if (warp == 1) {
    wait_for_cluster_writes(&empty_ptr[0], 0);
    out[row * 8] = data_ptr[2 * lane];
    out[row * 8 + 1] = data_ptr[2 * lane + 1];
  }
"""
    + END,
    # Both send to each other twice; the second round waits for what came before.
    "exchange": PEER
    + """
  __shared__ alignas(64) float sums_ptr[256];
"""
    + BEGIN
    + """
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) expect(&full_ptr[0], 64 * 16);
    float v = float(in[row * 8 + round]);
    send_4(mapped(&sums_ptr[4 * threadIdx.x], rank ^ 1), mapped(&full_ptr[0], rank ^ 1),
           v, v + 1, v + 2, v + 3);
    wait(&full_ptr[0], round);
    float sum = 0;
    for (int i = 0; i < 4; ++i) sum += sums_ptr[4 * threadIdx.x + i];
    out[row * 8 + round] = uint32_t(sum);
    cluster_arrive();
    cluster_wait();
  }
""",
    # Bytes can arrive before they are expected, and data that nobody waits for does not show.
    "late": PEER
    + BEGIN
    + """
  data_ptr[threadIdx.x] = 5;
  send(mapped(&data_ptr[threadIdx.x], rank), mapped(&full_ptr[0], rank), in[row * 8]);
  out[row * 8] = data_ptr[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) expect(&full_ptr[0], 256);
  wait(&full_ptr[0], 0);
  out[row * 8 + 1] = data_ptr[threadIdx.x];
""",
    "peers_deadlock": PEER + BEGIN + "  if (rank == 1 && warp == 1) wait(&full_ptr[0], 0);\n" + END,
    "left_before": PEER
    + BEGIN
    + """
  if (rank == 1 && warp == 0) arrive_remote(mapped(&empty_ptr[0], 0));
  if (rank == 0) {
    wait(&empty_ptr[0], 0);
    arrive_remote(mapped(&empty_ptr[0], 1));
  }
""",
    "left_before_a_store": PEER
    + BEGIN
    + "  send(mapped(&data_ptr[lane], rank ^ 1), mapped(&full_ptr[0], rank ^ 1), 3);\n"
    + BEGIN,
    "two_ctas": PEER + BEGIN + "  send(mapped(&data_ptr[lane], 0), mapped(&full_ptr[0], 1), 3);\n",
    "no_mbarrier": PEER + BEGIN + "  send(mapped(&data_ptr[0], 0), mapped(&full_ptr[1], 0), 3);\n",
    "odd_store": PEER
    + BEGIN
    + "  send_4(mapped(&data_ptr[2], 0), mapped(&full_ptr[0], 0), 1, 2, 3, 4);\n",
    "not_begun": PEER + "  arrive_remote(mapped(&empty_ptr[0], rank ^ 1));\n",
}


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    parts = [kernel(name, body, threads=64) for name, body in KERNELS.items()]
    parts += [kernel(name, body, threads=64, cluster=2) for name, body in CLUSTERS.items()]
    return compile_source(source(HELPERS, *parts), tmp_path_factory.mktemp("mbarriers"))


ORDERS = pytest.mark.parametrize("descending", [False, True])


def run(module, name, **options):
    """The words given, and those that came, [CTA, warp, lane, word]."""
    given = torch.arange(256 * 8, dtype=torch.int32).view(256, 8) % 1000 * 7 + 3
    out = torch.full((256, 8), -1, dtype=torch.int32)
    module[name](given, out, **options)
    return given.view(4, 2, 32, 8), out.view(4, 2, 32, 8)


def neighbours(words):
    """Of lanes."""
    return words[:, torch.arange(32) ^ 1]


@ORDERS
def test_ring_of_two_buffers(module, descending):
    given, out = run(module, "ring", descending=descending)
    assert torch.equal(out[:, 1], neighbours(given[:, 0]))


@ORDERS
def test_producers_that_do_not_wait_overtake(module, descending):
    with pytest.raises(RuntimeError, match=r"waits at mbarrier\.try_wait"):
        run(module, "overtaking_ring", descending=descending)


@ORDERS
def test_one_lane_waits_for_its_warp(module, descending):
    given, out = run(module, "one_lane_waits", descending=descending)
    assert torch.equal(out[:, 1, :, 0], given[:, 0, :, 0])


@ORDERS
def test_tests_of_a_phase(module, descending):
    """The phase before the first one counts as complete."""
    _, out = run(module, "tests", descending=descending)
    assert bool((out[..., 0] == 1).all())
    assert bool((out[:, 1, :, 1] == 77).all())
    assert bool((out[:, 1, :, 2] == 0).all())
    assert bool((out[:, 0, 0, 1] == 1).all())
    assert bool((out[:, 1, :, 3] <= 2).all())


@ORDERS
def test_named_barriers_with_arrivals(module, descending):
    given, out = run(module, "named", descending=descending)
    assert torch.equal(out[:, 1, :, :4], neighbours(given[:, 0])[..., :4])


@ORDERS
def test_remote_arrivals(module, descending):
    given, out = run(module, "remote_arrivals", descending=descending)
    assert torch.equal(out[::2, 1, :, :2], given[1::2, 0, :, :2])


@ORDERS
def test_stores_to_one_another(module, descending):
    given, out = run(module, "exchange", descending=descending)
    sums = (given[[1, 0, 3, 2], ..., :2] * 4 + 6).int()
    assert torch.equal(out[..., :2], sums)


@ORDERS
def test_stores_arrive_late(module, descending):
    given, out = run(module, "late", descending=descending)
    assert bool((out[..., 0] == 5).all())
    assert torch.equal(out[..., 1], given[..., 0])


def test_registers_are_not_counted(module):
    assert bool((run(module, "registers")[1][..., 0] == 1).all())


@ORDERS
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arrivals_apart", "barrier 1: all must name the same number of threads, got "),
        ("arrives_twice", "a thread must not arrive at barrier 1 again before it is complete"),
        ("arrives_and_waits", "a thread that has arrived at barrier 1 must not wait at it"),
        ("odd_count", "threads must be a multiple of 32, got 48"),
        (
            "nobody_arrives",
            r"warp 0 lane 0 waits at bar.sync of line \d+, warp 1 lane 0 has exited",
        ),
        ("two_lines", r"warp 0 lane 0 waits at bar.sync of line \d+, warp 1 lane 0 waits at bar"),
        (
            "deadlock",
            r"lane 0 waits at mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 of line \d+ for "
            "parity 0, which needs 2 arrivals and 0 bytes, warp 1 lane 0 has exited",
        ),
        ("not_there", "address must be one of an mbarrier, got other memory"),
        ("no_count", "count must be 1 to 1048575, got 0"),
        ("too_many", "arrivals must be 1 to the 1 that the phase still needs, got 2"),
        ("misaligned", "address must be a multiple of 8 bytes"),
        ("parity", "parity must be 0 or 1, got 2"),
        ("odd_registers", "registers must be a multiple of 8 from 24 to 256, got 100"),
        (
            "peers_deadlock",
            r"cluster: .* CTA 0 warp 0 lane 0 waits at barrier.cluster.wait.acquire of line \d+; "
            r"CTA 1 warp 0 lane 0 waits at barrier.cluster.wait.acquire of line \d+, warp 1 lane 0 "
            r"waits at mbarrier.try_wait.* needs 1 arrivals",
        ),
        ("left_before", "CTA 1 of the cluster must be there, got one that has exited"),
        ("left_before_a_store", "must be there when a store arrives, got one that has exited"),
        ("two_ctas", "address and mbarrier must be of one CTA, got ranks 0 and 1"),
        ("no_mbarrier", "address must be one of an mbarrier, got other memory"),
        ("odd_store", "address must be a multiple of 16 bytes"),
        ("not_begun", "of the cluster must have begun; put a barrier.cluster before"),
    ],
)
def test_wrong_kernels_are_told(module, name, message, descending):
    with pytest.raises(RuntimeError, match=message):
        run(module, name, descending=descending)


def test_a_predicate_that_is_negated_is_refused():
    text = (
        "{ .reg .pred q; mbarrier.test_wait.parity.shared.b64 q, [%1], %2; selp.b32 %0, 0, 1, q; }"
    )
    with pytest.raises(TranslationError, match="test_wait"):
        translate(f'asm volatile("{text}" : "=r"(d) : "r"(a), "r"(b));')
