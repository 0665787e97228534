# Table 2e, I3D 3x3x3 R101: 74.1 top-1, 91.2 top-5 (paper, not reproduced here)
from ..common.models import I3D, R101, classifier

model = classifier(**R101, **{**I3D, "inflate": "3x3x3"})
