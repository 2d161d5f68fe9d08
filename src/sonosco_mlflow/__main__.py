"""``python -m sonosco_mlflow``: the command line."""

from sonosco_mlflow.cli import main

if __name__ == "__main__":
    main()
