"""The site: `sphinx-build -W --keep-going -n -c docs . build/site`, which leaves everything in build/.

The source folder is the repository, so that a relative link means the same here and on GitHub. CONTRIBUTING.md says why
it is Sphinx.
"""
import argparse
import os
import re

from docutils import nodes
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import signature, stringify_signature

from vt_zoo import __version__
from vt_zoo.cli.main import create_parser

project = 'vt_zoo'
author = 'The vt_zoo authors'
version = release = __version__
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode']

root_doc = 'docs/index'
include_patterns = [
    'docs/**.md', 'docs/**.rst', 'docs/*.ipynb', 'benchmarks/results/*.md', 'CHANGELOG.md', 'CONTRIBUTING.md',
    'MODEL_CARDS.md']
exclude_patterns = ['.*', 'build', 'dist', 'tests', 'vt_zoo']

myst_heading_anchors = 3  # as GitHub makes them
nb_execution_mode = 'off'  # a notebook shows the outputs that were committed

autoclass_content = 'both'  # arguments stand in the docstring of __init__
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100  # longer ones get a line for each argument
default_role = 'code'  # docstrings write `name` as Markdown does

# names of other libraries: their pages are not asked for where they are, the build needs no internet
nitpick_ignore_regex = [('py:.*', r'(PIL|huggingface_hub|numpy|pathlib|timm|torch)\..*')]

html_theme = 'furo'
html_title = f'vt_zoo {release}'
html_copy_source = False
html_css_files = ['site.css']
html_show_copyright = False
html_static_path = ['_static']
html_additional_pages = {'index': 'front.html'}
templates_path = ['_templates']


def from_the_root(app, path, document, text):
    """Write the relative links of an included document so that they mean the same wherever it is included."""
    text[0] = re.sub(r'\]\((?!/|#|\w+:)', '](/', text[0])


def with_subparsers(parser):
    """A parser and all below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from with_subparsers(subparser)


def readable_arguments(app, what, name, obj, options, arguments, returns):
    """Those of __init__ where a __new__ of huggingface_hub takes any, and no <factory>, which is not Python."""
    if what == 'class' and arguments == '(*args, **kwargs)':
        arguments = stringify_signature(
            signature(obj.__init__, bound_method=True), show_return_annotation=False, unqualified_typehints=True)
    return arguments and arguments.replace('<factory>', '...'), returns


class CommandLine(SphinxDirective):
    """A section for each command, with what its --help prints."""

    def run(self):
        os.environ.update(COLUMNS='100', NO_COLOR='1')  # argparse reads them
        sections = []
        for parser in with_subparsers(create_parser()):
            section = nodes.section(ids=[nodes.make_id(parser.prog)])
            section += nodes.title(text=parser.prog)
            section += nodes.literal_block(text=parser.format_help(), language='none')
            sections.append(section)
        return sections


def setup(app):
    """Sphinx calls this."""
    app.add_directive('command-line', CommandLine)
    app.connect('autodoc-process-signature', readable_arguments)
    app.connect('include-read', from_the_root)
