# Tables 2g, 3, NL I3D R50: 76.5 top-1, 92.6 top-5 (paper, not reproduced here)
from ..common.models import I3D, NL5, long_classifier

model = long_classifier(**I3D, **NL5)
