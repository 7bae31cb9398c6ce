"""The colours of classes, keypoints and curves.

They are Okabe and Ito's, which are safe for all kinds of colour vision; curves have a second
palette for dark pages, with a contrast of at least 3 to 1 to the background.
"""

ORANGE = "#E69F00"
SKY_BLUE = "#56B4E9"
GREEN = "#009E73"
YELLOW = "#F0E442"
BLUE = "#0072B2"
VERMILION = "#D55E00"
PURPLE = "#CC79A7"
WHITE = "#FFFFFF"  # instead of their black, over grey slices

# Class 1 has the first colour.
CLASSES = (ORANGE, SKY_BLUE, GREEN, YELLOW, BLUE, VERMILION, PURPLE, WHITE)

MATCHED = SKY_BLUE
UNMATCHED = ORANGE
CORRESPONDENCE = GREEN
MASKED = PURPLE

# Curves on white, and in the same order on black.
CURVES = (
    *("#0067a5", "#c24e00", "#00805c", "#b8509a", "#9a6b00", "#2f8fd0", "#6b6b6b", "#7a1fa2"),
)
CURVES_ON_BLACK = (
    *("#6ab8f2", "#ff9a4d", "#2fd0a0", "#f0a0d0", "#f0e442", "#9fd8ff", "#b8b8b8", "#c99bff"),
)
