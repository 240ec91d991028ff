"""The layouts in which LoRA files are written, for flags: nothing is loaded here."""

OWN, PUBLISHED, KOHYA, PEFT = "own", "published", "kohya", "peft"
LAYOUTS = (OWN, PUBLISHED, KOHYA, PEFT)
