"""Continue the original experiment's five prompts with a model.

python examples/five_prompts.py MODEL
"""

import sys

from smolseek.cli.demonstrating import continue_prompts

for line in continue_prompts(sys.argv[1]):
    print(line, flush=True)
