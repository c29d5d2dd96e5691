"""The code blocks of the documents. A block may have a name behind its language, as in ```sh quickstart.

    python3 tests/documents.py README.md quickstart

prints the block of that name.
"""
import re
import sys
from pathlib import Path
from typing import List, Tuple

ROOT = Path(__file__).parents[1]


def blocks(document: str, *languages: str, name: str = '') -> List[Tuple[str, str]]:
    """Blocks of a document of the repository, in its order.

    Args:
        document: Path from the root of the repository.
        *languages: Those that are wanted; all where none is given.
        name: That they have; by default those without a name.

    Returns:
        Language and content of each.
    """
    text = (ROOT / document).read_text(encoding='utf-8')
    found = re.findall(r'^```(\w+)(?: (\w+))?\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
    return [(of, code) for of, called, code in found if called == name and (not languages or of in languages)]


if __name__ == '__main__':
    (_, block), = blocks(sys.argv[1], name=sys.argv[2])
    print(block, end='')
