"""What checks shapes and types while the tests run (see addopts in pyproject.toml).

beartype refuses an int where a float is asked for; Python's own rules (PEP 484) do not.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
