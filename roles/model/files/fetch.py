"""Fetches a model at a commit, inside the runtime image: `python3 - REPOSITORY COMMIT DIRECTORY [PATTERN ...]`.

A fetch that was cut off goes on where it stopped. The token, if any, is in the file that HF_TOKEN_PATH names.
"""

import shutil
import sys
from pathlib import Path

from huggingface_hub import snapshot_download

repository, revision, directory, *ignored = sys.argv[1:]
snapshot_download(repository, revision=revision, local_dir=directory, ignore_patterns=ignored)
# Its own notes, which are no part of the model.
shutil.rmtree(Path(directory) / ".cache", ignore_errors=True)
