# Table 2f, NL I3D R50: 74.9 top-1, 91.6 top-5 (paper, not reproduced here)
from ..common.models import I3D, NL5, classifier

model = classifier(**I3D, **NL5)
