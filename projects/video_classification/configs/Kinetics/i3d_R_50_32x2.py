# Table 2f, I3D R50: 73.3 top-1, 90.7 top-5 (paper, not reproduced here)
from ..common.models import I3D, classifier

model = classifier(**I3D)
