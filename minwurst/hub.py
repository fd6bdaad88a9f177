"""Push the result of a finished run to the Hub.

    python -m minwurst.hub OUTPUT_DIR owner/name
"""

from pathlib import Path

from minwurst.base.errors import one_line
from minwurst.base.parser import Parser
from minwurst.edge import push, run_file


def main():
    parser = Parser(prog="python -m minwurst.hub")
    parser.add_argument("folder", help="the --output_dir of a finished run")
    parser.add_argument("repository", help="owner/name on the Hub, or a name under your account")
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    given = parser.parse_args()
    folder = Path(given.folder)
    with one_line("minwurst.hub"):
        push.results(folder, run_file.read(folder))
        push.push(folder, push.make_repository(given.repository, given.private))


if __name__ == "__main__":
    main()
