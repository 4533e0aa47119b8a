"""Prove that an artifact leaves its base alone, and decide by the certificate.  A minute or two on a CPU.

python examples/certify.py [FOLDER]      an artifact, such as convert_and_generate.py writes
"""

import sys

import retrofit
from retrofit.errors import GateError

folder = sys.argv[1] if len(sys.argv) > 1 else "tiny-retrofit"

certificate = retrofit.certify(folder, level="quick", offline=True)
for check in certificate.checks:
    print(f"{check.status:<8} {check.name:<14} {check.detail}")
print(f"wrote {certificate.save(folder)}, for {certificate.what}", file=sys.stderr)

try:
    certificate.require()
except GateError as error:
    sys.exit(f"not to be used here: {error}")
