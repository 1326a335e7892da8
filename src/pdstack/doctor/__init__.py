"""What is right and wrong about a GPU host: `probe` reads facts, `checks` judges them, `report` tells."""
