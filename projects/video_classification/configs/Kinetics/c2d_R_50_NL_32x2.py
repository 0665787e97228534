# Tables 2a to 2c, one embedded Gaussian, R50: 72.7 top-1, 90.5 top-5 (paper, not reproduced here)
from ..common.models import NL, classifier

model = classifier(**NL)
