//! Line plots as SVG, for figures that grow with something: both axes logarithmic, one line a series.
//!
//! It measures nothing and knows no units but for their names.

use std::fmt::Write;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 360.0;
/// Left, top, right and bottom of the drawing, in pixels.
const FRAME: (f64, f64, f64, f64) = (80.0, 40.0, 470.0, 310.0);
const COLOURS: [&str; 6] = ["#1b6ca8", "#c8553d", "#2e8b57", "#8e5ea2", "#b8860b", "#555555"];

/// A line: its name and its points.
pub type Series = (String, Vec<(f64, f64)>);

/// The place of a value between the powers of ten around all values, from 0 to 1.
struct Axis {
    least: f64,
    most: f64,
}

impl Axis {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let positive: Vec<f64> = values.filter(|value| *value > 0.0).map(f64::log10).collect();
        let least = positive.iter().copied().fold(f64::INFINITY, f64::min).floor();
        let most = positive.iter().copied().fold(f64::NEG_INFINITY, f64::max).ceil();
        if least.is_finite() {
            Self { least, most: most.max(least + 1.0) }
        } else {
            Self { least: 0.0, most: 1.0 }
        }
    }

    fn place(&self, value: f64) -> f64 {
        (value.max(10f64.powf(self.least)).log10() - self.least) / (self.most - self.least)
    }

    /// The powers of ten.
    fn marks(&self) -> Vec<f64> {
        let mut marks = Vec::new();
        let mut power = self.least;
        while power <= self.most {
            marks.push(10f64.powf(power));
            power += 1.0;
        }
        marks
    }
}

/// Draws lines over a common axis.
pub fn svg(title: &str, across: &str, series: &[Series]) -> String {
    let points = || series.iter().flat_map(|(_, points)| points.iter().copied());
    let (x, y) = (Axis::of(points().map(|(x, _)| x)), Axis::of(points().map(|(_, y)| y)));
    let (left, top, right, bottom) = FRAME;
    let at = |(a, b): (f64, f64)| (left + x.place(a) * (right - left), bottom - y.place(b) * (bottom - top));
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n\
         <text x=\"{left}\" y=\"22\" font-size=\"14\">{title}</text>\n\
         <text x=\"{}\" y=\"350\" text-anchor=\"middle\">{across}</text>\n",
        f64::midpoint(left, right)
    );
    let mut add = |text: String| svg.write_str(&text).expect("a string can always be written to");
    for mark in x.marks() {
        let (at, _) = at((mark, 1.0));
        add(format!("<line x1=\"{at:.1}\" y1=\"{top}\" x2=\"{at:.1}\" y2=\"{bottom}\" stroke=\"#ddd\"/>\n"));
        add(format!("<text x=\"{at:.1}\" y=\"328\" text-anchor=\"middle\">{mark}</text>\n"));
    }
    for mark in y.marks() {
        let (_, at) = at((1.0, mark));
        add(format!("<line x1=\"{left}\" y1=\"{at:.1}\" x2=\"{right}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\n"));
        add(format!("<text x=\"72\" y=\"{:.1}\" text-anchor=\"end\">{mark}</text>\n", at + 4.0));
    }
    for (number, (name, points)) in series.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let places: Vec<_> = points.iter().map(|point| at(*point)).collect();
        let line: Vec<_> = places.iter().map(|(a, b)| format!("{a:.1},{b:.1}")).collect();
        add(format!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n",
            line.join(" ")
        ));
        for (a, b) in places {
            add(format!("<circle cx=\"{a:.1}\" cy=\"{b:.1}\" r=\"3\" fill=\"{colour}\"/>\n"));
        }
        let row = top + 16.0 * number as f64;
        add(format!("<text x=\"484\" y=\"{:.1}\" fill=\"{colour}\">{name}</text>\n", row + 10.0));
    }
    svg + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_is_inside_the_frame_and_in_order() {
        let line = ("a".to_owned(), vec![(10.0, 3.0), (100.0, 30.0), (5000.0, 2.0)]);
        let text = svg("title", "nodes", &[line]);
        let places: Vec<(f64, f64)> = text
            .lines()
            .filter_map(|line| line.strip_prefix("<circle cx=\""))
            .map(|line| {
                let mut parts = line.split('"');
                let x = parts.next().expect("cx").parse().expect("a number");
                (x, parts.nth(1).expect("cy").parse().expect("a number"))
            })
            .collect();
        assert_eq!(places.len(), 3);
        let (left, top, right, bottom) = FRAME;
        assert!(places.iter().all(|(x, y)| (left..=right).contains(x) && (top..=bottom).contains(y)));
        assert!(places.is_sorted_by(|a, b| a.0 < b.0) && places[1].1 < places[0].1);
    }
}
