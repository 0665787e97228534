# Table 2g, I3D R50: 74.9 top-1, 91.7 top-5 (paper, not reproduced here)
from ..common.models import I3D, long_classifier

model = long_classifier(**I3D)
