# No row in the paper: TSM R50 with blocks placed as released, 75.6 top-1 there
from ..common.models import tsm

model = tsm(
    after_blocks={"res3": [0, 2], "res4": [0, 2, 4]},
    block_options={"scale": False, "subsample_position": "after_conv"},
)
