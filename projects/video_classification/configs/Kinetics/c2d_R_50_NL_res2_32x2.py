# Table 2b, res2: 72.7 top-1, 90.3 top-5 (paper, not reproduced here)
from ..common.models import classifier

model = classifier(after_blocks={"res2": [-2]})
