# Table 2g, I3D R101: 76.4 top-1, 92.7 top-5 (paper, not reproduced here)
from ..common.models import I3D, R101, long_classifier

model = long_classifier(**R101, **I3D)
