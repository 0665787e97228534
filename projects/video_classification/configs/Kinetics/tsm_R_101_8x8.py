# No row in the paper: TSM R101, which shifts in every other block
from ..common.models import R101, tsm

model = tsm(shift_every=2, **R101)
