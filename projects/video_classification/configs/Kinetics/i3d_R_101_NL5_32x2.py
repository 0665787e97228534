# Table 2f, NL I3D R101: 76.0 top-1, 92.1 top-5 (paper, not reproduced here)
from ..common.models import I3D, R101_NL5, classifier

model = classifier(**I3D, **R101_NL5)
