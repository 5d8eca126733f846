"""An engine with few, small shapes for tests: it compiles in half a minute, and its pages, slots and caches
run out soon.
"""

from minicpmv46_jax import MiniCPMV
from serve.engine.memory_plan import EncoderShape, MemoryPlan, ShapeBuckets
from serve.engine.model_runner import ModelRunner

BUCKETS = ShapeBuckets(
    decode_rows=(),
    decode_steps=2,
    prefill_shapes=((256, 4),),
    encoder_shapes=(EncoderShape(1152, 1, 1152), EncoderShape(4608, 4, 1152)),
)
SMALL_PLAN = MemoryPlan(
    max_running=8, num_snapshots=8, num_pages=160, max_model_len=2048, encoder_cache_rows=2048, buckets=BUCKETS
)
FEW_PAGES = MemoryPlan(  # requests are preempted
    max_running=6, num_snapshots=0, num_pages=19, max_model_len=1024, encoder_cache_rows=2048, buckets=BUCKETS
)


def make_runner(model: MiniCPMV, plan: MemoryPlan) -> ModelRunner:
    """Returns a compiled runner with the model's parameters."""
    runner = ModelRunner(model.config, model.params, plan)
    runner.compile()
    runner.load(model.params)
    return runner
