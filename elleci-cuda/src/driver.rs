//! A card, through the driver API.
