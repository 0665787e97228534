"""See :mod:`nl_detectron_cli.visualize_attention`, or ``--help``."""

from nl_detectron_cli.visualize_attention import main

if __name__ == "__main__":
    main()
