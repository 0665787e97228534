# No row in the paper: TSM R50 for online use: no frame depends on a later one
from ..common.models import tsm

model = tsm({"direction": "unidirectional"})
