# Table 4, I3D: 35.5 mAP on train/val, 37.2 on trainval/test (paper, not reproduced here)
from ..common.models import CHARADES, I3D, R101, long_classifier

model = long_classifier(CHARADES, **R101, **I3D)
