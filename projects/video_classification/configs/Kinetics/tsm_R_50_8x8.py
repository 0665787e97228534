# No row in the paper: TSM R50, 74.1 top-1 as released for Kinetics
from ..common.models import tsm

model = tsm()
