# Tables 2g, 3, NL I3D R101: 77.7 top-1, 93.3 top-5; 83.8 in the test (paper, not reproduced here)
from ..common.models import I3D, R101_NL5, long_classifier

model = long_classifier(**I3D, **R101_NL5)
