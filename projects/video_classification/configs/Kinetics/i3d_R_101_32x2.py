# Tables 2e (I3D 3x1x1) and 2f (I3D), R101: 74.4 top-1, 91.1 top-5 (paper, not reproduced here)
from ..common.models import I3D, R101, classifier

model = classifier(**R101, **I3D)
