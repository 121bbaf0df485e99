//! Figures of the benches: contenders take turns, and what one took is compared with what the other took in the same round.
//!
//! It measures nothing itself. Invariant: a ratio is formed within a round and only then put in order, so that what slows
//! the machine for a while slows both sides of it.

use std::fmt;

/// Lets contenders take turns, `rounds` times; every second round backwards, so that none always comes after the same one.
pub fn interleaved<C>(rounds: usize, contenders: &mut [C], mut turn: impl FnMut(usize, &mut C)) {
    for round in 0..rounds {
        for place in 0..contenders.len() {
            let place = if round % 2 == 0 { place } else { contenders.len() - 1 - place };
            turn(round, &mut contenders[place]);
        }
    }
}

/// Returns the part `of_all` (0.5 is the median, 0.99 the 99th percentile) of figures, by nearest rank.
///
/// # Panics
/// Without a figure.
pub fn quantile(figures: &[f64], of_all: f64) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1).expect("something was measured");
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place in the list")]
    let place = (last as f64 * of_all).round() as usize;
    sorted[place.min(last)]
}

/// Returns the median of figures.
///
/// # Panics
/// Without a figure.
pub fn median(figures: &[f64]) -> f64 {
    quantile(figures, 0.5)
}

/// One figure of several rounds: the median, the least and the most.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
}

impl Spread {
    /// Puts figures together.
    ///
    /// # Panics
    /// Without a figure.
    pub fn of(figures: &[f64]) -> Self {
        Self { median: median(figures), least: quantile(figures, 0.0), most: quantile(figures, 1.0) }
    }
}

/// `median [least..most]`, with the decimals asked for, or two.
impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(2);
        let text = format!("{:.digits$} [{:.digits$}..{:.digits$}]", self.median, self.least, self.most);
        // Not `pad`: to that a precision is a number of characters.
        write!(f, "{text:>width$}", width = f.width().unwrap_or(0))
    }
}

/// Series of figures by name, one figure a round, in the order of their first figure.
#[derive(Debug, Clone, Default)]
pub struct Figures(Vec<(String, Vec<f64>)>);

impl Figures {
    /// Adds a round's figure to a series.
    pub fn add(&mut self, series: &str, figure: f64) {
        match self.0.iter_mut().find(|(name, _)| name == series) {
            Some((_, figures)) => figures.push(figure),
            None => self.0.push((series.to_owned(), vec![figure])),
        }
    }

    /// Returns a series, one figure a round.
    ///
    /// # Panics
    /// Where there is no such series.
    pub fn series(&self, name: &str) -> &[f64] {
        let found = self.0.iter().find(|(series, _)| series == name);
        &found.unwrap_or_else(|| panic!("nothing was measured under the name {name:?}")).1
    }

    /// Returns the names of the series.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// Returns a series as median, least and most.
    ///
    /// # Panics
    /// Where there is no such series.
    pub fn spread(&self, series: &str) -> Spread {
        Spread::of(self.series(series))
    }

    /// Returns how one series compares with another, round by round.
    ///
    /// # Panics
    /// Where there is no such series, or where they have not the same rounds.
    pub fn ratio(&self, one: &str, other: &str) -> Spread {
        let (ones, others) = (self.series(one), self.series(other));
        assert_eq!(ones.len(), others.len(), "{one:?} and {other:?} were not measured in the same rounds");
        let ratios: Vec<f64> = ones.iter().zip(others).map(|(one, other)| one / other).collect();
        Spread::of(&ratios)
    }

    /// Prints one line for a ratio: `name ratio [least..most]`.
    ///
    /// # Panics
    /// As [`Figures::ratio`].
    pub fn print_ratio(&self, name: &str, one: &str, other: &str) {
        println!("{name} {}", self.ratio(one, other));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_formed_within_each_round() {
        let mut figures = Figures::default();
        // The machine is ten times slower in the second round; the medians alone would say 0.5 / 10.
        for (ours, theirs) in [(0.5, 1.0), (5.0, 10.0), (6.0, 10.0)] {
            figures.add("ours", ours);
            figures.add("theirs", theirs);
        }
        assert_eq!(figures.ratio("ours", "theirs"), Spread { median: 0.5, least: 0.5, most: 0.6 });
        assert_eq!(figures.names().collect::<Vec<_>>(), ["ours", "theirs"]);
        assert_eq!(figures.spread("ours").to_string(), "5.00 [0.50..6.00]");
        assert_eq!(format!("{:>15.1}", figures.spread("ours")), " 5.0 [0.5..6.0]");
    }

    #[test]
    fn contenders_take_turns_and_none_is_always_last() {
        let mut turns = Vec::new();
        interleaved(3, &mut ["a", "b"], |round, contender| turns.push(format!("{contender}{round}")));
        assert_eq!(turns, ["a0", "b0", "b1", "a1", "a2", "b2"]);
    }

    #[test]
    fn quantiles_are_figures_that_were_measured() {
        let figures: Vec<f64> = (1..=101).rev().map(f64::from).collect();
        assert_eq!([0.0, 0.5, 0.99, 1.0].map(|part| quantile(&figures, part)), [1.0, 51.0, 100.0, 101.0]);
        assert_eq!(median(&[7.0]), 7.0);
    }
}
