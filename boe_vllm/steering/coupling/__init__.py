"""Estimators of the interaction between writes (the pair terms of eq. 9), one file each.

- `exact`: every candidate's write, the response of all masked rows; the oracle.
- `pairs`: the same, but only the pool's own rows respond.
- `attention`: mean attention between the rows times the smaller entropy; costs no forward.
- `overlap`: mean attention times the overlap of what the two predictions are unsure of; costs no
  forward.
"""
