//! Laws of the record encoding.
