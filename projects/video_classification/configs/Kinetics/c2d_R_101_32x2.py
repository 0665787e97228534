# Tables 2c to 2f, C2D R101: 73.1 top-1, 91.0 top-5 (paper, not reproduced here)
from ..common.models import R101, classifier

model = classifier(**R101)
