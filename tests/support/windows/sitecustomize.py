"""Where this folder is in PYTHONPATH, Python runs this first: a program, and what it starts, live by Windows' rules."""

from tests.support.windows_rules import impose

impose()
