// Just enough JSON to print a result.
#pragma once

#include <concepts>
#include <cstdint>
#include <cstdio>
#include <string>

namespace bench {

class JsonObject {
 public:
  void add(const std::string& key, const std::string& text) {
    std::string quoted = "\"";
    for (const char c : text) {
      if (c == '"' || c == '\\') quoted += '\\';
      quoted += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
    }
    raw(key, quoted + '"');
  }
  template <std::unsigned_integral Integer>
  void add(const std::string& key, Integer value) {
    raw(key, std::to_string(value));
  }
  void add(const std::string& key, double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.6g", value);
    raw(key, text);
  }
  void add(const std::string& key, const JsonObject& object) { raw(key, object.text()); }
  template <typename Integers>
  void add_all(const std::string& key, const Integers& values) {
    std::string list;
    for (const auto value : values) list += (list.empty() ? "" : ", ") + std::to_string(value);
    raw(key, "[" + list + "]");
  }
  void add_null(const std::string& key) { raw(key, "null"); }

  std::string text() const { return "{" + members_ + "}"; }

 private:
  void raw(const std::string& key, const std::string& value) {
    if (!members_.empty()) members_ += ", ";
    members_ += "\"" + key + "\": " + value;
  }

  std::string members_;
};

}  // namespace bench
