# Tables 2c (5 blocks) and 2d (spacetime), R50: 73.8 top-1, 91.0 top-5 (paper, not reproduced here)
from ..common.models import NL5, classifier

model = classifier(**NL5)
