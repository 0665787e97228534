# Table 2b, res3: 72.9 top-1, 90.4 top-5 (paper, not reproduced here)
from ..common.models import classifier

model = classifier(after_blocks={"res3": [-2]})
