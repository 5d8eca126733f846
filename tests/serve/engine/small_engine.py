"""An engine of few, small shapes for tests: it compiles in half a minute, and its pages, slots and passes run out soon."""

from minicpmv46_jax import MiniCPMV
from serve.engine.memory_plan import Buckets, EncoderShape, MemoryPlan
from serve.engine.model_runner import ModelRunner

BUCKETS = Buckets(rows=(), steps=2, prompts=((256, 4),), passes=(EncoderShape(1152, 1, 1152), EncoderShape(4608, 4, 1152)))
SIZES = MemoryPlan(running=8, snapshots=8, pages=160, longest=2048, features=2048, buckets=BUCKETS)
FEW_PAGES = MemoryPlan(running=6, snapshots=0, pages=19, longest=1024, features=2048, buckets=BUCKETS)  # answers are put back


def device_of(model: MiniCPMV, sizes: MemoryPlan) -> ModelRunner:
    """The steps over a model that is loaded, ready."""
    device = ModelRunner(model.config, model.params, sizes)
    device.compile()
    device.load(model.params)
    return device
