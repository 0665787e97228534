"""See :mod:`nl_detectron_cli.predict`, or ``--help``."""

from nl_detectron_cli.predict import main

if __name__ == "__main__":
    main()
