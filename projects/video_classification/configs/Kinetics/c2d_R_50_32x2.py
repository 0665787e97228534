# Tables 2a to 2d and 2f, C2D R50: 71.8 top-1, 89.7 top-5 (paper, not reproduced here)
from ..common.models import classifier

model = classifier()
