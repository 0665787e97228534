# Table 4, NL I3D: 37.5 mAP on train/val, 39.5 on trainval/test (paper, not reproduced here)
from ..common.models import CHARADES, I3D, R101_NL5, long_classifier

model = long_classifier(CHARADES, **I3D, **R101_NL5)
