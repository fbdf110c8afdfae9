"""Only a real exhaustion of memory is `oom`."""

from __future__ import annotations

import signal

import pytest

from bertbench.trials.outcome import (
    MESSAGE_LIMIT,
    classify_error,
    classify_exit,
    memory_ran_out,
    recorded_outcome,
    summarise_error,
)

EAGER_OOM = (
    "{{function_node __wrapped__Fill_device_/job:localhost/replica:0/task:0/device:CPU:0}} OOM "
    "when allocating tensor with shape[52428800] and type float on "
    "/job:localhost/replica:0/task:0/device:CPU:0 by allocator bfc_cpu_allocator_for_gpu "
    "[Op:Fill] name: "
)
GRAPH_OOM = (
    "Graph execution error:\n\nDetected at node ones defined at (most recent call last):\n"
    '  File "step.py", line 9, in train\n\n'
    "OOM when allocating tensor with shape[100000,1000] and type float on "
    "/job:localhost/replica:0/task:0/device:GPU:0 by allocator GPU_0_bfc\n"
    "\t [[{{node ones}}]]\nHint: If you want to see a list of allocated tensors when OOM happens, "
    "add report_tensor_allocations_upon_oom to RunOptions.\n [Op:__inference_f_22]"
)

EXHAUSTED = [
    ("ResourceExhaustedError", EAGER_OOM),
    ("ResourceExhaustedError", GRAPH_OOM),
    ("ResourceExhaustedError", "failed to allocate memory [Op:AddV2]"),
    ("ResourceExhaustedError", "Out of memory while trying to allocate 7406166528 bytes."),
    (
        "XlaRuntimeError",
        "RESOURCE_EXHAUSTED: Failed to allocate request for 1.50GiB (1610612736B) on device "
        "ordinal 0",
    ),
    (
        "ResourceExhaustedError",
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.95G of "
        "15.48G hbm. Exceeded hbm capacity by 6.47G.",
    ),
    (
        "ResourceExhaustedError",
        "Attempting to allocate 4.00G. That was not possible. There are 3.21G free.",
    ),
    (
        "InternalError",
        "Failed copying input tensor from CPU:0 to GPU:0 in order to run Cast: Dst tensor is not "
        "initialized.",
    ),
    ("InternalError", "failed to create cublas handle: CUBLAS_STATUS_ALLOC_FAILED"),
    ("InternalError", "Could not create cudnn handle: CUDNN_STATUS_ALLOC_FAILED"),
    ("UnknownError", "failed to allocate 2.2K (2304 bytes) from device: CUDA_ERROR_OUT_OF_MEMORY"),
    ("InternalError", "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12 bytes."),
]

OTHER = [
    ("ValueError", GRAPH_OOM),
    ("InvalidArgumentError", "OOM when allocating tensor with shape[1]"),
    ("RuntimeError", "CUDA_ERROR_OUT_OF_MEMORY"),
    ("MemoryError", "Unable to allocate 8.00 EiB"),
    ("ResourceExhaustedError", "Received message larger than max (5000000 vs. 4194304)"),
    ("ResourceExhaustedError", "/tmp/a.tfrecord; Too many open files"),
    ("ResourceExhaustedError", "ckpt.data; No space left on device"),
    (
        "ResourceExhaustedError",
        "MemoryError: Unable to allocate 184. MiB for an array; out of memory",
    ),
    (
        "ResourceExhaustedError",
        "Compilation failure: Ran out of memory in memory space vmem.",
    ),
    ("ResourceExhaustedError", "Trying to access more queue slots than there are"),
    ("InternalError", "Blas GEMM launch failed : a.shape=(32, 768); Possibly out of memory?"),
    ("InternalError", "failed to create cublas handle: CUBLAS_STATUS_NOT_INITIALIZED"),
    ("InternalError", "CUDA runtime implicit initialization failed. Status: out of memory"),
    ("NotFoundError", "BLOOM when allocating tensor"),
]


# Host memory that ran out: of the machine, of a limit on a process, of what others left.
HOST = [
    (
        "ResourceExhaustedError",
        "OOM when allocating tensor with shape[8] on /job:localhost/replica:0/task:0/device:CPU:0 "
        "by allocator cpu",
    ),
    ("ResourceExhaustedError", "OOM when allocating tensor with shape[8] by allocator mklcpu"),
    (
        "ResourceExhaustedError",
        "OOM when allocating tensor with shape[8] by allocator gpu_host_bfc",
    ),
    # A capped CPU's whole budget under `ulimit -v`, before any batch.
    (
        "ResourceExhaustedError",
        "{{function_node __wrapped__Empty_device_/job:localhost/replica:0/task:0/device:CPU:0}} "
        "OOM when allocating tensor with shape[1998,1048576] and type uint8 on "
        "/job:localhost/replica:0/task:0/device:CPU:0 by allocator bfc_cpu_allocator_for_gpu "
        "[Op:Empty]",
    ),
    ("ResourceExhaustedError", "out of memory: fork: Cannot allocate memory"),
    ("ResourceExhaustedError", "out of memory (std::bad_alloc)"),
    (
        "InternalError",
        "could not allocate pinned host memory of size: 4096; CUDA_ERROR_OUT_OF_MEMORY",
    ),
    (
        "InternalError",
        "failed to alloc 4096 bytes on host: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    ),
    ("AbortedError", "Operation received an exception: could not create a memory object"),
]


@pytest.mark.parametrize(("type_name", "message"), HOST)
def test_host_memory_that_ran_out_is_no_limit(type_name: str, message: str) -> None:
    assert classify_error(type_name, message) == "failed"
    assert recorded_outcome("oom", summarise_error(type_name, message)) == "failed"
    # A run may go on with less all the same.
    assert memory_ran_out(type_name, message) is (type_name != "AbortedError")


@pytest.mark.parametrize(("type_name", "message"), EXHAUSTED)
def test_what_was_recorded_of_a_device_stays(type_name: str, message: str) -> None:
    assert recorded_outcome("oom", summarise_error(type_name, message)) == "oom"
    assert recorded_outcome("fits", "") == "fits"
    assert recorded_outcome("failed", summarise_error(type_name, message)) == "failed"


@pytest.mark.parametrize(("type_name", "message"), EXHAUSTED)
def test_exhausted_memory_is_recognised(type_name: str, message: str) -> None:
    assert classify_error(type_name, message) == "oom"


@pytest.mark.parametrize(("type_name", "message"), OTHER)
def test_other_errors_are_no_limit(type_name: str, message: str) -> None:
    assert classify_error(type_name, message) == "failed"


@pytest.mark.parametrize(
    ("type_name", "message", "expected"),
    [
        (
            "ResourceExhaustedError",
            GRAPH_OOM,
            "ResourceExhaustedError: OOM when allocating tensor with shape[100000,1000] and type "
            "float on /job:localhost/replica:0/task:0/device:GPU:0 by allocator GPU_0_bfc",
        ),
        (
            "ResourceExhaustedError",
            EAGER_OOM,
            "ResourceExhaustedError: OOM when allocating tensor with shape[52428800] and type "
            "float on /job:localhost/replica:0/task:0/device:CPU:0 by allocator "
            "bfc_cpu_allocator_for_gpu",
        ),
        (
            "InvalidArgumentError",
            "Graph execution error:\n\nDetected at node x\nindices[0] = 7 is not in [0, 5)\n"
            "\t [[{{node x}}]] [Op:__inference_f_1]",
            "InvalidArgumentError: indices[0] = 7 is not in [0, 5)",
        ),
        ("ValueError", "first\nsecond", "ValueError: first"),
        ("KeyboardInterrupt", "", "KeyboardInterrupt"),
    ],
)
def test_the_telling_line_is_kept(type_name: str, message: str, expected: str) -> None:
    assert summarise_error(type_name, message) == expected


def test_a_summary_is_short() -> None:
    assert len(summarise_error("ValueError", "x" * 10_000)) == MESSAGE_LIMIT


def test_a_kill_by_the_kernel_is_told_from_one_by_a_person() -> None:
    before = {"memory.events": 3, "vmstat": 10}
    for after, source in (
        ({"memory.events": 4, "vmstat": 11}, "memory.events"),
        ({"memory.events": 3, "vmstat": 11}, "vmstat"),
    ):
        outcome, reason = classify_exit(-9, before, after, ALLOCATOR_LOG)
        assert outcome == "failed"
        assert reason == (
            f"killed by the kernel for want of host memory ({source}), which tells nothing of the "
            "batch; end what holds the memory, or give a smaller --memory"
        )
    for after in (before, {}, {"another": 9}):
        outcome, reason = classify_exit(-9, before, after)
        assert (outcome, reason) == ("failed", "killed by SIGKILL; not known to be out of memory")


ALLOCATOR_LOG = (
    "W0000 00:00:1.619248   10926 bfc_allocator.cc:502] Allocator (bfc_cpu_allocator_for_gpu) ran "
    "out of memory trying to allocate 1.4KiB (rounded to 1536)requested by op MatMul_4\n"
    "I0000 00:00:1.619408   10926 bfc_allocator.cc:1049] BFCAllocator dump\n"
    "F0000 00:00:1.621835   10926 tensor.cc:896] Check failed: dtype() == expected_dtype \n"
)


def test_a_crash_of_a_kernel_that_got_no_memory_is_out_of_memory() -> None:
    """A real log of oneDNN's batched matrix product, shortened."""
    for number in (signal.SIGABRT, signal.SIGSEGV):
        outcome, reason = classify_exit(-number, {}, {}, ALLOCATOR_LOG)
        assert outcome == "oom"
        assert "requested by op MatMul_4" in reason
        assert number.name in reason


@pytest.mark.parametrize(
    ("exit_code", "printed"),
    [
        (1, ALLOCATOR_LOG),
        (-signal.SIGTERM, ALLOCATOR_LOG),
        (-signal.SIGKILL, ALLOCATOR_LOG),
        (-signal.SIGABRT, "Allocator (x) ran out of memory trying to allocate 1.4KiB\n"),
        (-signal.SIGABRT, "OOM when allocating tensor"),
        # The host's memory ran out too, or its allocator's alone.
        (-signal.SIGABRT, ALLOCATOR_LOG + "  what():  std::bad_alloc\n"),
        (-signal.SIGSEGV, ALLOCATOR_LOG + "mmap: Cannot allocate memory\n"),
        (-signal.SIGABRT, ALLOCATOR_LOG.replace("bfc_cpu_allocator_for_gpu", "gpu_host_bfc")),
        # What an operation asked for and can do without.
        (
            -signal.SIGSEGV,
            ALLOCATOR_LOG.replace(
                "requested by op MatMul_4",
                " with freed_by_count=0. The caller indicates that "
                "this is not a failure, but may mean that there could be performance gains",
            ),
        ),
    ],
)
def test_words_about_memory_alone_are_not(exit_code: int, printed: str) -> None:
    assert classify_exit(exit_code, {}, {}, printed)[0] == "failed"


@pytest.mark.parametrize(
    ("exit_code", "reason"),
    [
        (-signal.SIGSEGV, "killed by SIGSEGV (segmentation fault)"),
        (-signal.SIGABRT, "killed by SIGABRT (aborted)"),
        (-signal.SIGUSR1, "killed by SIGUSR1"),
        (-200, "killed by signal 200"),
        (3, "the trial's process ended with exit code 3"),
        (0, "the trial's process ended without a result"),
        (None, "the trial's process could not be ended"),
    ],
)
def test_other_ends_are_failures_with_their_cause(exit_code: int | None, reason: str) -> None:
    # An OOM kill elsewhere on the machine does not turn a crash into a limit.
    assert classify_exit(exit_code, {"vmstat": 1}, {"vmstat": 2}) == ("failed", reason)
