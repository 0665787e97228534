# Tables 2c, 2d (spacetime) and 2e, NL C2D R101: 75.1 top-1, 91.7 top-5 (paper, not reproduced here)
from ..common.models import R101_NL5, classifier

model = classifier(**R101_NL5)
