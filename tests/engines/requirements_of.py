"""Print the requirements of an installed package, less some: requirements_of.py PACKAGE [LEAVE_OUT …]. For wheels that ask for more than a CPU has use for."""

import re
import sys
from importlib.metadata import requires

package, *without = sys.argv[1:]
for line in requires(package) or ():
    name = re.match(r"[A-Za-z0-9_.-]+", line)[0].lower().replace("_", "-")
    if "extra ==" not in line and name not in without:
        print(line)
