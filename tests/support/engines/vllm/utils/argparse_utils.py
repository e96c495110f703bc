"""Where vLLM's parser of the command line is."""

import argparse


class FlexibleArgumentParser(argparse.ArgumentParser):
    """A parser."""
